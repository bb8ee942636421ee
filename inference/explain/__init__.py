"""What a trained network sees in a case: prompts, masks, classes, uncertainty."""
