"""Does a model's answer follow from the chain of thought before it, and does fine-tuning change that?"""
