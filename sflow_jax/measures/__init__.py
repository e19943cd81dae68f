"""Measures of pictures: feature networks, PSNR, SSIM."""
