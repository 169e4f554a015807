"""The project's own packed folder: a memory map of images, masks and factors, on disk or in object storage."""
