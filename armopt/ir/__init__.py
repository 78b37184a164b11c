"""What flows between the stages: records, torch.fx graphs and how values nest. See docs/design.md."""
