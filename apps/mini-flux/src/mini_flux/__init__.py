"""A small real FLUX pipeline: procedural scenes, training from nothing, and a judge of its images."""
