"""Program 1: pretrain a ViT encoder on images without labels."""
