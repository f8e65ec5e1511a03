"""BF16 and 4-bit images of one prompt and one seed, side by side in the browser."""
