"""Fused blocks, one file per model family; a family without a file runs layer by layer."""
