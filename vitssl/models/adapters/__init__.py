"""One file for each family of timm models: how to embed, drop or replace tokens, and run the blocks."""
