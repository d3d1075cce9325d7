"""Sampling as a service: an engine that requests join at any step, replicas, and an HTTP API."""
