"""`dmax chat`: a conversation in the terminal, in which drafts sharpen before your eyes."""
