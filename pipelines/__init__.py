"""Beam graphs: wiring only. What a shard or a conversation is lives in the stages."""
