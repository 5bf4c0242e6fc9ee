"""A denoising diffusion model of handwritten digits, fine-tuned through LoRA adapters."""
