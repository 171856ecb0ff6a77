"""Pages of HTML that stand alone: one style and one frame for reports of runs and explanations of answers.

panels  Charts of lines as values.
page    Pages from sections of text, tables and charts, and templates on the same frame with a script of their own.
"""
