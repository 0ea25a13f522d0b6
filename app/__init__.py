"""What a user talks to: the Serve application, its configuration, the OpenAI and admin APIs."""
