// Hovering over a cell shows its numbers, and beside them what restoring that site brought back.
(() => {
  const tip = document.getElementById("tip");
  const uriOf = (id) => { const image = document.getElementById(id); return image ? image.src : ""; };
  const picture = (caption, style) => {
    const box = document.createElement("div");
    const frame = document.createElement("i");
    Object.assign(frame.style, style);
    box.append(frame, caption);
    return box;
  };
  const show = (cell, event) => {
    tip.replaceChildren();
    cell.dataset.tip.split("\n").forEach((line, i) => {
      const part = document.createElement(i ? "span" : "b");
      part.textContent = line;
      tip.append(part);
    });
    const sheet = document.getElementById(cell.dataset.sheet || "");
    if (sheet) {
      const columns = +sheet.dataset.columns, rows = +sheet.dataset.rows, spot = +cell.dataset.spot;
      const across = columns > 1 ? (spot % columns) / (columns - 1) : 0;
      const down = rows > 1 ? Math.floor(spot / columns) / (rows - 1) : 0;
      const row = document.createElement("div");
      row.className = "pics";
      for (const role of ["clean", "corrupt"]) {
        const uri = uriOf(`${sheet.dataset.example}-${role}`);
        if (uri) row.append(picture(role, { backgroundImage: `url(${uri})` }));
      }
      row.append(picture("restored here", {
        backgroundImage: `url(${sheet.src})`,
        backgroundSize: `${columns * 100}% ${rows * 100}%`,
        backgroundPosition: `${across * 100}% ${down * 100}%`,
      }));
      tip.append(row);
    }
    tip.style.display = "block";
    move(event);
  };
  const move = (event) => {
    const margin = 14, box = tip.getBoundingClientRect();
    let x = event.clientX + margin, y = event.clientY + margin;
    if (x + box.width > innerWidth - 8) x = event.clientX - box.width - margin;
    if (y + box.height > innerHeight - 8) y = event.clientY - box.height - margin;
    tip.style.left = `${Math.max(8, x)}px`;
    tip.style.top = `${Math.max(8, y)}px`;
  };
  for (const cell of document.querySelectorAll("rect.cell")) {
    const title = cell.querySelector("title");
    if (!title) continue;
    cell.dataset.tip = title.textContent;
    title.remove();  // else the browser's own tooltip appears as well
    cell.addEventListener("pointerenter", (event) => show(cell, event));
    cell.addEventListener("pointermove", move);
    cell.addEventListener("pointerleave", () => { tip.style.display = "none"; });
  }
  document.documentElement.dataset.ready = "yes";
})();
