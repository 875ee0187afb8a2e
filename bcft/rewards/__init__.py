"""Reward functions: the interface, and the one for mathematics."""

from bcft.rewards.base import Reward
from bcft.rewards.math_answers import extract_answer, math_reward

__all__ = ["Reward", "extract_answer", "math_reward"]
