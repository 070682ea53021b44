// Makes HTML of mail as its frameworks do: node mime_corpus.mjs MODULES OUT
//
// MODULES is a directory with node_modules (mjml, inky, mailgen, cheerio, foundation-emails, and
// what React Email needs); each message is one file below OUT, named after the framework.
import { createRequire } from "node:module";
import fs from "node:fs";
import path from "node:path";

const [modules, out] = process.argv.slice(2);
const require = createRequire(path.resolve(modules, "package.json"));

function write(kind, name, html) {
  const directory = path.join(out, kind);
  fs.mkdirSync(directory, { recursive: true });
  fs.writeFileSync(path.join(directory, name + ".html"), html);
}

function* files(directory, extension) {
  for (const entry of fs.readdirSync(directory, { withFileTypes: true })) {
    const file = path.join(directory, entry.name);
    if (entry.isDirectory()) yield* files(file, extension);
    else if (entry.name.endsWith(extension)) yield file;
  }
}

async function attempt(what, make) {
  try {
    await make();
  } catch (error) {
    console.error(`${what}: left out (${String(error).split("\n")[0].slice(0, 200)})`);
  }
}

const SECTION = (inner) => `<mj-section><mj-column>${inner}</mj-column></mj-section>`;
const MJML = {
  text: SECTION("<mj-text>Hi</mj-text><mj-button href='https://x.example/'>Go</mj-button>"),
  image: SECTION("<mj-image src='https://x.example/a.png' alt='a' fluid-on-mobile='true'/>"),
  hero: "<mj-hero mode='fixed-height' height='469px' background-url='https://x.example/a.png'>" +
    "<mj-text>Hi</mj-text></mj-hero>",
  carousel: SECTION("<mj-carousel><mj-carousel-image src='https://x.example/a.png'/>" +
    "<mj-carousel-image src='https://x.example/b.png'/></mj-carousel>"),
  accordion: SECTION("<mj-accordion><mj-accordion-element><mj-accordion-title>T" +
    "</mj-accordion-title><mj-accordion-text>x</mj-accordion-text></mj-accordion-element>" +
    "</mj-accordion>"),
  navbar: SECTION("<mj-navbar hamburger='hamburger' base-url='https://x.example'>" +
    "<mj-navbar-link href='/a'>A</mj-navbar-link><mj-navbar-link href='/b'>B</mj-navbar-link>" +
    "</mj-navbar>"),
  social: SECTION("<mj-social mode='horizontal'><mj-social-element name='facebook' href='https:" +
    "//x.example/'>F</mj-social-element><mj-social-element name='x' href='https://x.example/'>" +
    "X</mj-social-element></mj-social>"),
  table: SECTION("<mj-table><tr><th>A</th><td>1</td></tr></mj-table><mj-divider/><mj-spacer/>"),
  wrapper: "<mj-wrapper background-url='https://x.example/a.png' full-width='full-width'>" +
    SECTION("<mj-text>x</mj-text>") + "</mj-wrapper>",
  background: "<mj-section background-url='https://x.example/a.png' background-size='cover' " +
    "full-width='full-width'><mj-group><mj-column><mj-text>a</mj-text></mj-column><mj-column>" +
    "<mj-text>b</mj-text></mj-column></mj-group></mj-section>",
  raw: "<mj-raw><!-- htmlmin:ignore --></mj-raw>" + SECTION("<mj-text>x</mj-text>"),
};
const HEAD = "<mj-head><mj-title>News</mj-title><mj-preview>May</mj-preview><mj-font name='Roboto'" +
  " href='https://fonts.example/css?family=Roboto'/><mj-breakpoint width='480px'/><mj-style>" +
  "a > b { color: red }</mj-style><mj-style inline='inline'>.i { color: blue }</mj-style>" +
  "</mj-head>";

await attempt("mjml", async () => {
  let mjml2html = require("mjml");
  mjml2html = mjml2html.default ?? mjml2html;
  const options = { keepComments: true, validationLevel: "soft" };
  for (const [name, body] of Object.entries(MJML))
    for (const [head, variant] of [["", "plain"], [HEAD, "styled"]]) {
      const { html } = await mjml2html(`<mjml>${head}<mj-body>${body}</mj-body></mjml>`, options);
      write("mjml", `${name}-${variant}`, html);
    }
  const all = Object.values(MJML).join("\n");
  write("mjml", "all", (await mjml2html(`<mjml>${HEAD}<mj-body>${all}</mj-body></mjml>`, options)).html);
});

await attempt("foundation", async () => {
  const { Inky } = require("inky");
  const cheerio = require("cheerio");
  const root = path.join(modules, "node_modules/foundation-emails");
  const css = [...files(path.join(root, "dist"), "foundation-emails.css")]
    .map((file) => fs.readFileSync(file, "utf8"))[0] ?? "";
  for (const file of files(root, ".html")) {
    const source = fs.readFileSync(file, "utf8").replace(/^---[\s\S]*?---\n/, "");
    const html = new Inky().releaseTheKraken(source, { decodeEntities: false });
    const styled = html.includes("</head>")
      ? html.replace("</head>", `<style>${css}</style></head>`)
      : `<html><head><style>${css}</style></head><body>${html}</body></html>`;
    write("foundation", path.basename(file, ".html"), styled);
  }
  void cheerio;
});

await attempt("mailgen", async () => {
  const Mailgen = require("mailgen");
  for (const theme of ["default", "neopolitan", "salted", "cerberus"]) {
    const mail = new Mailgen({ theme, product: { name: "X", link: "https://x.example/" } });
    const action = { instructions: "Go:", button: { color: "#22BC66", text: "Go", link: "https://x.example/" } };
    const table = { data: [{ item: "A", price: "1" }], columns: { customAlignment: { price: "right" } } };
    const body = { name: "Y", intro: "Welcome <b>!", action, table, dictionary: { date: "May" }, outro: "Bye" };
    write("mailgen", theme, mail.generate({ body }));
  }
});

await attempt("react-email", async () => {
  const esbuild = require("esbuild");
  const templates = [...files(path.join(modules, "node_modules/create-email"), ".tsx")];
  for (const file of templates)
    await attempt(file, async () => {
      const bundle = path.join(modules, "bundle-" + path.basename(file, ".tsx") + ".cjs");
      await esbuild.build({ entryPoints: [file], bundle: true, platform: "node", format: "cjs",
        outfile: bundle, jsx: "automatic", alias: { "react-email": "@react-email/components" }, logLevel: "silent", nodePaths: [path.join(modules, "node_modules")] });
      const element = require(path.resolve(bundle)).default;
      const { render } = require("@react-email/render");
      const html = await render(require("react").createElement(element, element.PreviewProps ?? {}));
      write("react-email", path.basename(file, ".tsx"), html);
    });
});
