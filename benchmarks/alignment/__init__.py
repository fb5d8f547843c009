"""What preference alignment gains and costs."""
