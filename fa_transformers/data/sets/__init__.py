"""Data sets that come with the package: real documents and images, and generated tasks."""
