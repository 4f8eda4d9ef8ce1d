"""Files of pictures: which format one is, and what of it reaches Pillow."""
