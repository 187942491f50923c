"""The parts of tools/train_demo_models.py: corpus -> dialogues -> tokenizer -> fit -> export -> measure."""
