"""IT tickets: how well a model predicts the time to close."""
