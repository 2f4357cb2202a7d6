"""Training of GANs whose discriminators keep their spectrum, and the comparison of constraints."""
