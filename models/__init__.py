"""Image and text towers, the two-tower model, and the heads of self-supervised terms."""
