"""What Serve runs: the LLMReplica (engine loop + llumlet), the router and the global scheduler."""
