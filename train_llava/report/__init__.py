"""`oxe-mix report`: a folder of any stage as one page for the eye."""
