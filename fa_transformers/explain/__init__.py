"""Explanations: which tokens, passages or patches an encoder's attention and a classifier's answer rest on.

encoder      The way through an encoder's layers, forwards and backwards, in little memory.
implied      The N×N matrix that a layer's mixer stands for, in factored form: products with it in O(N).
attention    Rows and columns of that matrix, and rollout through all layers.
attribution  Scores of tokens for one of a classifier's answers, by five methods.
units        Sentences, passages and patches: the parts of an input that scores are added up over.
deletion     Faithfulness: how far the answer falls when what scored highest is deleted.
"""
