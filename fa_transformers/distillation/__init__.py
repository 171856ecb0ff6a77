"""Recovery of a converted model from its softmax teacher, and the receipt of it."""
