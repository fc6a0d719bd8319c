"""Data: digits, images and text, as the training and the comparison read them."""
