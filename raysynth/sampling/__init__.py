"""Drawing synthetic samples: the engine that denoises, and the runs that feed it."""
