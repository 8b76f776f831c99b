"use strict";
// Draws the facts of a checkpoint. Texts of the checkpoint are set as textContent, never as markup.

const facts = JSON.parse(document.getElementById("facts").textContent);
const page = document.getElementById("page");
const SVG = "http://www.w3.org/2000/svg";
const PALETTE = ["#4e79a7", "#e8862a", "#59a14f", "#d9534f", "#3f9c9c", "#b58900", "#9d6b9b", "#8a6a52",
  "#d4688a", "#6b7a90"];
const UNKNOWN = "#a3abb7";
const MAP = {width: 1190, height: 380};
const ROWS_AT_ONCE = 100;
const LEGEND = 40;
const ALONE = 64; // more boxes in a small drawing become one path for each colour
const CONTROL = /[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g;

const hasRanks = facts.ranks.some((rank) => rank !== null);
const view = {q: "", by: hasRanks ? "rank" : "file", sort: "size", name: null, limit: ROWS_AT_ONCE};

// Values

function plain(text) {
  return String(text).replace(CONTROL, (c) => {
    const code = c.charCodeAt(0).toString(16);
    return code.length > 2 ? "\\u" + code.padStart(4, "0") : "\\x" + code.padStart(2, "0");
  });
}

function showBytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  let size = count;
  while (size >= 1024 && unit < units.length - 1) { size /= 1024; unit += 1; }
  return unit ? `${size.toFixed(1)} ${units[unit]}` : `${count} B`;
}

// A shard is [file, offset, shape, bytes]; its owner is a file or a rank.

function ownerOf(shard) {
  if (shard[0] < 0) return null;
  return view.by === "rank" ? facts.ranks[shard[0]] : shard[0];
}

function ownerName(owner) {
  if (owner === null) return view.by === "rank" ? "unknown rank" : "in no file";
  return view.by === "rank" ? `rank ${owner}` : plain(facts.files[owner]);
}

function colourOf(owner) {
  if (owner === null) return UNKNOWN;
  if (owner < PALETTE.length) return PALETTE[owner];
  // The golden angle keeps the hues of neighbours far apart.
  return `hsl(${Math.round((owner * 137.508) % 360)} 55% ${owner % 2 ? 42 : 55}%)`;
}

function ownersOf(row) {
  const sums = new Map();
  for (const shard of row.shards || []) {
    const owner = ownerOf(shard);
    sums.set(owner, (sums.get(owner) || 0) + shard[3]);
  }
  return sums;
}

// Elements

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function draw(tag, attributes, title) {
  const element = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (title !== undefined) {
    const text = document.createElementNS(SVG, "title");
    text.textContent = title;
    element.append(text);
  }
  return element;
}

// Layout of one tensor: the two dimensions that are cut, or else the first two.

function drawnDimensions(row) {
  const dims = row.shape.map((_, n) => n);
  const cut = dims.filter((n) => row.shards.some((shard) => shard[1][n] > 0));
  const rest = dims.filter((n) => !cut.includes(n));
  return [...cut, ...rest].slice(0, 2).sort((a, b) => a - b);
}

function drawLayout(row, widest, highest) {
  const dims = drawnDimensions(row);
  const [down, across] = dims.length === 2 ? dims : [-1, dims.length ? dims[0] : -1];
  const side = (sizes, dim, fill) => (dim < 0 ? fill : sizes[dim]);
  const rows = Math.max(side(row.shape, down, 1), 1);
  const columns = Math.max(side(row.shape, across, 1), 1);
  const ratio = rows / columns;
  const width = Math.min(widest, Math.max(highest / ratio, widest / 3));
  const height = Math.min(highest, Math.max(width * ratio, highest / 8));
  const svg = draw("svg", {width: width.toFixed(1), height: height.toFixed(1), role: "img",
    class: "shards"});
  const box = (shard) => ({
    x: (side(shard[1], across, 0) / columns) * width, y: (side(shard[1], down, 0) / rows) * height,
    w: (side(shard[2], across, 1) / columns) * width, h: (side(shard[2], down, 1) / rows) * height,
  });
  if (row.shards.length <= ALONE || widest > 200) {
    for (const shard of row.shards) drawShard(svg, row, shard, box(shard));
  } else {
    drawPaths(svg, row, box);
  }
  return {svg, down, across};
}

function drawShard(svg, row, shard, at) {
  const owner = ownerOf(shard);
  const file = shard[0] < 0 ? "in no file" : plain(facts.files[shard[0]]);
  const title = `offset [${shard[1].join(", ")}], shape [${shard[2].join(", ")}], ` +
    `${showBytes(shard[3])}, ${file}`;
  const line = Math.min(at.w, at.h) > 3 ? 1 : 0;
  svg.append(draw("rect", {x: at.x.toFixed(2), y: at.y.toFixed(2), width: at.w.toFixed(2),
    height: at.h.toFixed(2), fill: colourOf(owner), stroke: "#fff", "stroke-width": line}, title));
}

function drawPaths(svg, row, box) {
  const paths = new Map();
  for (const shard of row.shards) {
    const at = box(shard);
    const path = `M${at.x.toFixed(2)} ${at.y.toFixed(2)}h${at.w.toFixed(2)}v${at.h.toFixed(2)}` +
      `h${(-at.w).toFixed(2)}z`;
    const owner = ownerOf(shard);
    paths.set(owner, (paths.get(owner) || "") + path);
  }
  for (const [owner, path] of paths) svg.append(draw("path", {d: path, fill: colourOf(owner)}));
}

// Treemap: squarified (Bruls, Huizing, van Wijk, 2000), nested by the parts of the names.

function buildTree(rows) {
  const root = {label: "", children: new Map(), nbytes: 0, row: null};
  for (const row of rows) {
    let node = root;
    const parts = row.name.split(".");
    node.nbytes += row.nbytes;
    parts.forEach((part, depth) => {
      const key = depth === parts.length - 1 ? `=${part}` : part; // a name may also be a prefix
      if (!node.children.has(key)) {
        node.children.set(key, {label: part, children: new Map(), nbytes: 0, row: null});
      }
      node = node.children.get(key);
      node.nbytes += row.nbytes;
    });
    node.row = row;
  }
  for (const [prefix, count, nbytes] of facts.omitted) addOmitted(root, prefix, count, nbytes);
  return root;
}

function addOmitted(root, prefix, count, nbytes) {
  if (!nbytes) return;
  let node = root;
  node.nbytes += nbytes;
  for (const part of prefix ? prefix.split(".") : []) {
    if (!node.children.has(part)) {
      node.children.set(part, {label: part, children: new Map(), nbytes: 0, row: null});
    }
    node = node.children.get(part);
    node.nbytes += nbytes;
  }
  const label = `${count.toLocaleString("en")} more`;
  node.children.set("/omitted", {label, children: new Map(), nbytes, row: {kind: "omitted", nbytes,
    name: prefix ? `${prefix}: ${label}` : label}});
}

function squarify(nodes, area) {
  const sorted = [...nodes].sort((a, b) => b.nbytes - a.nbytes);
  const total = sorted.reduce((sum, node) => sum + node.nbytes, 0);
  const scale = (area.w * area.h) / total;
  const placed = [];
  let rest = {...area};
  let at = 0;
  while (at < sorted.length) {
    const short = Math.max(Math.min(rest.w, rest.h), 1e-9);
    let sum = 0;
    let end = at;
    let worst = Infinity;
    while (end < sorted.length) {
      const next = sum + sorted[end].nbytes * scale;
      const thick = next / short;
      const first = (sorted[at].nbytes * scale) / thick;
      const last = (sorted[end].nbytes * scale) / thick;
      const ratio = Math.max(first / thick, thick / first, last / thick, thick / last);
      if (ratio > worst) break;
      worst = ratio;
      sum = next;
      end += 1;
    }
    const thick = sum / short;
    const across = rest.w >= rest.h;
    let from = across ? rest.y : rest.x;
    for (; at < end; at += 1) {
      const length = (sorted[at].nbytes * scale) / thick;
      placed.push([sorted[at], across
        ? {x: rest.x, y: from, w: thick, h: length} : {x: from, y: rest.y, w: length, h: thick}]);
      from += length;
    }
    rest = across
      ? {x: rest.x + thick, y: rest.y, w: Math.max(rest.w - thick, 0), h: rest.h}
      : {x: rest.x, y: rest.y + thick, w: rest.w, h: Math.max(rest.h - thick, 0)};
  }
  return placed;
}

function clip(label, width) {
  const most = Math.floor((width - 6) / 6.5);
  return label.length <= most ? label : most > 3 ? `${label.slice(0, most - 1)}…` : "";
}

function drawGroup(svg, node, area) {
  // A chain of single children is one group, with a joined label.
  let label = plain(node.label);
  let inner = node;
  while (inner.children.size === 1 && !inner.row) {
    inner = inner.children.values().next().value;
    label = label ? `${label}.${plain(inner.label)}` : plain(inner.label);
  }
  if (inner.row) return drawLeaf(svg, inner.row, label, area);
  let room = area;
  const gap = Math.min(area.w, area.h) > 24 ? 2 : 0;
  const head = label && area.w > 46 && area.h > 40 ? 14 : 0;
  room = {x: area.x + gap, y: area.y + gap + head, w: area.w - 2 * gap, h: area.h - 2 * gap - head};
  if (head) {
    const text = draw("text", {x: area.x + 4, y: area.y + 12, class: "group"});
    text.textContent = clip(label, area.w);
    svg.append(text);
  }
  for (const [child, place] of squarify(inner.children.values(), room)) drawGroup(svg, child, place);
}

function drawLeaf(svg, row, label, area) {
  const owners = row.shards ? ownersOf(row) : new Map();
  const among = owners.size > 1 ? `, of ${owners.size} ${view.by}s` : "";
  const group = draw("g", {class: row.kind === "omitted" ? "leaf omitted" : "leaf"},
    `${plain(row.name)}: ${describe(row)}${among}`);
  const along = area.w >= area.h;
  const side = along ? area.w : area.h;
  const whole = [...owners.values()].reduce((sum, nbytes) => sum + nbytes, 0);
  const parts = !whole || owners.size > side / 2 ? [[null, 1]] : [...owners];
  const total = parts[0][0] === null && parts.length === 1 ? 1 : whole;
  let from = 0;
  for (const [owner, nbytes] of parts) {
    const length = (side * nbytes) / total;
    const box = along ? {x: area.x + from, y: area.y, width: length, height: area.h}
      : {x: area.x, y: area.y + from, width: area.w, height: length};
    for (const key of Object.keys(box)) box[key] = box[key].toFixed(2);
    group.append(draw("rect", {...box, fill: colourOf(owner)}));
    from += length;
  }
  // The outline of the tensor, over the strips of its owners.
  group.append(draw("rect", {x: area.x.toFixed(2), y: area.y.toFixed(2), width: area.w.toFixed(2),
    height: area.h.toFixed(2), fill: "none", stroke: "#fff",
    "stroke-width": Math.min(area.w, area.h) > 6 ? 1 : 0.3, class: "outline"}));
  if (area.w > 34 && area.h > 16) {
    const text = draw("text", {x: area.x + 5, y: area.y + 14});
    text.textContent = clip(label, area.w);
    group.append(text);
  }
  if (row.kind === "tensor") group.addEventListener("click", () => change({name: row.name}));
  group.dataset.name = row.name;
  svg.append(group);
}

function drawTreemap() {
  const svg = draw("svg", {viewBox: `0 0 ${MAP.width} ${MAP.height}`, class: "treemap", role: "img"});
  const tensors = facts.rows.filter((row) => row.kind === "tensor" && row.nbytes > 0);
  if (!tensors.length) return svg;
  drawGroup(svg, buildTree(tensors), {x: 0, y: 0, w: MAP.width, h: MAP.height});
  return svg;
}

// The parts of the page

const parts = {};

function describe(row) {
  if (row.kind === "omitted") return `${showBytes(row.nbytes)}, not in this page`;
  if (row.kind === "value") return `value, ${showBytes(row.nbytes)}`;
  const shards = row.count === 1 ? "1 shard" : `${row.count.toLocaleString("en")} shards`;
  return `${row.dtype} [${row.shape.join(", ")}], ${shards}, ${showBytes(row.nbytes)}`;
}

function select(choices, current, title, choose) {
  const label = make("label", "", `${title} `);
  const list = make("select");
  for (const choice of choices) {
    const option = make("option", "", choice);
    option.value = choice;
    option.selected = choice === current;
    list.append(option);
  }
  list.addEventListener("change", () => choose(list.value));
  label.append(list);
  return label;
}

function build() {
  parts.treemap = make("div");
  parts.legend = make("div", "legend");
  const controls = make("div", "controls");
  parts.search = make("input");
  parts.search.type = "search";
  parts.search.placeholder = "Search names: parts, in any order";
  parts.search.addEventListener("input", () => change({q: parts.search.value, limit: ROWS_AT_ONCE}));
  parts.count = make("span", "count");
  controls.append(parts.search, parts.count,
    select(["size", "name"], view.sort, "Sort by", (sort) => change({sort})));
  if (hasRanks) {
    controls.append(select(["rank", "file"], view.by, "Colour by", (by) => change({by})));
  }
  parts.detail = make("div");
  parts.list = make("div");
  page.append(parts.treemap, parts.legend, controls, parts.detail, parts.list);
}

function matches() {
  const words = view.q.toLowerCase().split(/\s+/).filter(Boolean);
  return facts.rows.filter((row) => words.every((word) => row.name.toLowerCase().includes(word)));
}

function showLegend() {
  const sums = new Map();
  for (const row of facts.rows) {
    if (!row.shards) continue;
    for (const [owner, nbytes] of ownersOf(row)) sums.set(owner, (sums.get(owner) || 0) + nbytes);
  }
  const owners = [...sums].sort((a, b) => (a[0] === null) - (b[0] === null) || a[0] - b[0]);
  parts.legend.replaceChildren(...owners.slice(0, LEGEND).map(([owner, nbytes]) => {
    const entry = make("span");
    const square = make("i");
    square.style.background = colourOf(owner);
    entry.append(square, `${ownerName(owner)}  ${showBytes(nbytes)}`);
    return entry;
  }));
  if (owners.length > LEGEND) parts.legend.append(make("span", "", `and ${owners.length - LEGEND} more`));
}

function showDetail() {
  parts.detail.replaceChildren();
  const row = facts.rows.find((one) => one.name === view.name);
  if (!row) return;
  const box = make("section", "detail");
  const head = make("div", "head");
  const close = make("button", "", "Close");
  close.addEventListener("click", () => change({name: null}));
  head.append(make("h2", "", plain(row.name)), close);
  box.append(head);
  const line = make("p", "", describe(row));
  box.append(line);
  if (row.kind === "tensor" && row.shards) {
    const {svg, down, across} = drawLayout(row, 700, 300);
    if (across >= 0) {
      line.append(down >= 0 ? `; dimension ${down} runs down, ${across} to the right`
        : `; dimension ${across} runs to the right`);
    }
    const beside = make("div", "beside");
    beside.append(svg, listShards(row));
    box.append(beside);
  } else if (row.kind === "tensor") {
    box.append(make("p", "", "Its shards did not fit into this page."));
  }
  parts.detail.append(box);
}

function listShards(row) {
  const scroll = make("div", "scroll");
  const table = makeTable([["file", ""], ["offset", ""], ["shape", ""], ["bytes", "number"]]);
  for (const shard of row.shards.slice(0, 500)) {
    const line = make("tr");
    line.append(make("td", "", shard[0] < 0 ? "in no file" : plain(facts.files[shard[0]])),
      make("td", "shape", `[${shard[1].join(", ")}]`), make("td", "shape", `[${shard[2].join(", ")}]`),
      make("td", "number", showBytes(shard[3])));
    table.append(line);
  }
  scroll.append(table);
  if (row.shards.length > 500) scroll.append(make("p", "", `and ${row.shards.length - 500} more`));
  return scroll;
}

function makeTable(columns) {
  const table = make("table");
  const head = make("tr");
  for (const [title, className] of columns) head.append(make("th", className, title));
  table.append(head);
  return table;
}

function showList() {
  const found = matches();
  if (view.sort === "name") found.sort((a, b) => (a.name < b.name ? -1 : a.name > b.name ? 1 : 0));
  const table = makeTable([["name", ""], ["dtype", ""], ["shape", ""], ["shards", "number"],
    ["bytes", "number"], ["layout", "layout"]]);
  table.className = "names";
  for (const row of found.slice(0, view.limit)) table.append(makeRow(row));
  parts.list.replaceChildren(table);
  if (found.length > view.limit) {
    const more = make("button", "more", `Show more of ${found.length.toLocaleString("en")}`);
    more.addEventListener("click", () => change({limit: view.limit + ROWS_AT_ONCE * 4}));
    parts.list.append(more);
  }
  const all = facts.rows.length;
  parts.count.textContent = view.q ? `${found.length.toLocaleString("en")} of ${all.toLocaleString("en")}`
    : `${all.toLocaleString("en")} names`;
  return new Set(found.map((row) => row.name));
}

function makeRow(row) {
  const line = make("tr", row.name === view.name ? "name selected" : "name");
  line.dataset.name = row.name;
  const isTensor = row.kind === "tensor";
  const layout = make("td", "layout");
  if (isTensor && row.shards && row.nbytes) layout.append(drawLayout(row, 130, 36).svg);
  line.append(make("td", "", plain(row.name)), make("td", "", isTensor ? row.dtype : "value"),
    make("td", "shape", isTensor ? `[${row.shape.join(", ")}]` : ""),
    make("td", "number", isTensor ? row.count.toLocaleString("en") : ""),
    make("td", "number", showBytes(row.nbytes)), layout);
  line.addEventListener("click", () => change({name: row.name}));
  return line;
}

function dimOthers(names) {
  for (const leaf of parts.treemap.querySelectorAll(".leaf")) {
    leaf.classList.toggle("other", Boolean(view.q) && !names.has(leaf.dataset.name));
    leaf.classList.toggle("selected", leaf.dataset.name === view.name);
  }
}

// The view is kept in the address, so that it can be linked: #q=wq&by=file&sort=name&name=model.wq

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  view.q = given.get("q") || "";
  view.sort = given.get("sort") === "name" ? "name" : "size";
  view.by = hasRanks && given.get("by") !== "file" ? "rank" : "file";
  view.name = given.get("name");
}

function writeAddress() {
  const kept = new URLSearchParams();
  if (view.q) kept.set("q", view.q);
  if (hasRanks && view.by === "file") kept.set("by", "file");
  if (view.sort !== "size") kept.set("sort", view.sort);
  if (view.name !== null) kept.set("name", view.name);
  history.replaceState(null, "", `#${kept}`);
}

function change(to) {
  const selects = "name" in to && to.name !== null;
  Object.assign(view, to);
  show("by" in to);
  writeAddress();
  if (selects) parts.detail.scrollIntoView({block: "nearest"});
}

function show(redrawn) {
  if (redrawn) {
    parts.treemap.replaceChildren(drawTreemap());
    showLegend();
  }
  showDetail();
  dimOthers(showList());
}

readAddress();
build();
parts.search.value = view.q;
show(true);
document.body.dataset.drawn = "yes";
