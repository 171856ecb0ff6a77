"""Checked reading of a user's own tables, image folders and streams."""
