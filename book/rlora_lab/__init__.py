"""What the chapters and the commands share: bases, tasks, training, measuring, plotting."""
