"""One augmented view of every image, as masking methods take it: they leave its colours alone."""

from vitssl.objectives.pairs import CropConfig
from vitssl.sections import PhotometricConfig
from vitssl.views import View


class SingleConfig(CropConfig):
    """A random resized crop at the encoder's image size."""

    photometric: PhotometricConfig = PhotometricConfig()

    def views(self, size: tuple[int, int]) -> dict[str, View]:
        """By the name ``image``."""
        return {"image": self.view(size)}
