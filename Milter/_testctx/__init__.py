"""What `Milter.testctx` is made of; import that, as names and places here may change.

`log`      a text file that is opened when a line is written
`macros`   which macros an MTA has sent by when
`message`  a message, header by header, with what a filter does to it
`context`  the real context's methods, and the records of what they did

A module imports those above it.
"""
