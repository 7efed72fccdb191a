"""Core types: budgets, sites, signals, contexts, selections, policies, reports; no model library."""
