"""From what a robot sees to what it does: a trained checkpoint as a policy, alone or behind a server."""
