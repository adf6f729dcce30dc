"""Program 2: fine-tune a pretrained encoder for classification."""
