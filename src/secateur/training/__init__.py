"""Training that keeps the zeros: fine-tuning, distillation, gradual pruning, rounds, adapters."""
