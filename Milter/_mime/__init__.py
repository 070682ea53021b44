"""What `mime` is made of; import that, as names and places here may change.

`limits`      the bounds, and what a check has used of them
`codings`     transfer encodings, bytes as text
`fields`      structured header fields, in every reading
`names`       names of files: which are dangerous
`zips`        names inside of zips
`containers`  names of files in what mail programs unpack from a text: uuencode, BinHex and others
`feedparser`  the standard library's parser, and what is used of its private members
`parsing`     bytes to a tree of parts
`boundaries`  boundaries that come out of a text when it is changed
`message`     `MimeMessage`, and how it is written back
`css`         scripts in style sheets and URLs
`markup`      tags and attributes: which of them do harm
`xml`         XML and SVG, what they declare, and what is packed in them
`charsets`    the charsets in which HTML might be seen
`html`        scripts in HTML, taken out
`defang`      the checks, and what stands in place of a part that did not pass

A module imports those above it.  What applications assign to in `mime` is read from there when it
is used (`limits.settings`).
"""
