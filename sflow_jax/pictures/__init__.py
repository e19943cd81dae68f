"""Pictures: files in and out, sizes, packed latents, grids."""
