"""Letters to phonemes on seqkern.seq2seq: data, training, checkpoints, evaluation, speaking, a report page."""
