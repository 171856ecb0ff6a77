"""Checked reading of a user's own tables, image folders, streams and pictures with objects."""
