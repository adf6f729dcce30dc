"""How an encoder is optimised layer by layer: rates that shrink with the distance from the head, and what is decayed.

Bao et al. 2022 (BEiT) fine-tune so; DINOv2 and DINOv3 pretrain so. Codes disagree in silence about what decays: MAE's and
DINO's pretraining decays class tokens and learned positions, since only vectors are spared; fine-tuning spares these too; MoCo
v3 spares nothing.
"""

from collections.abc import Sequence
from dataclasses import replace

from vitssl.sections import Decay
from vitssl.task import Rule, decay_rules

TOKENS = ("pos_embed", "cls_token", "reg_token", "rope.freqs")


def layer_decay_rules(
    depth: int,
    layer_decay: float,
    *,
    patch_lr: float = 1.0,
    decay: Decay = "layers",
    prefix: str = "encoder.vit.",
    others: str = ".*",
) -> list[Rule]:
    """Learning rates that shrink by ``layer_decay`` per layer below the head: block i has layer_decay^(depth - i), embeddings
    layer_decay^(depth + 1), the patch embedding ``patch_lr`` times that.

    As in MAE's ``util/lr_decay.py`` and DINOv2's ``param_groups.py``. ``prefix`` is what stands before timm's names in the
    task's parameter names; ``others`` the pattern of all names that the rules are to cover, whose rest has the full rate.
    """
    own, embed = prefix.replace(".", r"\."), layer_decay ** (depth + 1)
    stem, norm = r"patch_embed\..*", r"norm_pre\..*"
    rules = [Rule(token, own + token, embed, 0.0 if decay == "layers" else 1.0) for token in TOKENS]
    rules += decay_rules(own + stem, prefix="stem.", lr_scale=embed * patch_lr)
    rules += decay_rules(own + norm, prefix="norm_pre.", lr_scale=embed)
    for i in range(depth):
        rules += decay_rules(rf"{own}blocks\.{i}\..*", prefix=f"block{i}.", lr_scale=layer_decay ** (depth - i))
    rest = rf"(?!{own}(?:{'|'.join(TOKENS)}|{stem}|{norm}|blocks\..*)$){others}"
    return decaying(rules + decay_rules(rest, prefix="rest."), decay)


def decaying(rules: Sequence[Rule], decay: Decay) -> list[Rule]:
    """The same rules, or under ``all`` those that decay vectors as everything else."""
    if decay != "all":
        return list(rules)
    vectors = [rule.vectors is True for rule in rules]
    return [
        replace(rule, name=rule.name.replace("no_decay", "vectors"), weight_decay=1.0) if vector else rule
        for rule, vector in zip(rules, vectors, strict=True)
    ]
