"""Reward functions: what one is, how it is asked, and the one for mathematics."""

from bcft.rewards.math_answers import math_reward

__all__ = ["math_reward"]
