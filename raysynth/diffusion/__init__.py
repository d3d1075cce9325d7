"""Noise schedules, samplers and losses of diffusion models: pure functions of tensors."""
