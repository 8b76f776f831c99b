"""A checkpoint cut anew, into the parts that the ranks of another mesh would save."""
