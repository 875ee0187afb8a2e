"""Sampling engines behind one interface: requests in, actions out, in the order they finish."""
