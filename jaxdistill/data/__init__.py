"""From text to batches of token ids, in NumPy and without JAX.

settings     the knobs: DataConfig and MaskConfig
sources      the table of data sources, and their readers: documents out of files and data sets
vocabulary   the special tokens and the size of a tokenizer
encode       documents, plain or in pairs, to token ids
frame        token ids to rows of at most max_length tokens, with special tokens at their ends
prepare      a whole source to a folder on disk, named by a hash of its content
cache        writing that folder whole or not at all
store        that folder, opened
batching     which rows make a batch, and padding
masking      masked language models: the tokens to predict
causal       causal language models: the tokens to predict
pipeline     the batches of a training run, and of an evaluation
text         all of this from the settings: what the other rooms call
"""
