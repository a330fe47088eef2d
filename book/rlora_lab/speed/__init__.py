"""What a step costs: time, memory, arithmetic."""
