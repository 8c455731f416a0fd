"""What is built on a policy and a task besides ReST-EM: continual self-edits, continued pretraining."""
