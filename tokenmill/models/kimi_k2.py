"""Kimi K2: the architecture of DeepSeek V3."""

from tokenmill.models.deepseek_v3 import Config, Model

__all__ = ["Config", "Model"]
