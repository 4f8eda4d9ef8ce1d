// Keeps Z-Image i2L Apply as low as the original node, so that in saved workflows it covers nothing.
//
// Nodes 2.0 hides inputs that are "advanced" behind a button. The classic canvas draws all of them, and both count them
// in a node's height. Here they are hidden on the classic canvas, too, unless one of them has been changed; the node's
// menu shows them.
import { app } from "../../scripts/app.js";

const NODE = "ZImageI2L_Apply";

function advanced(node) {
  return (node.widgets ?? []).filter((widget) => widget.options?.advanced);
}

function fold(node, folded) {
  const before = node.computeSize()[1];
  for (const widget of advanced(node)) widget.hidden = folded; // Nodes 2.0 asks widget.options instead
  node.setSize([node.size[0], node.size[1] + node.computeSize()[1] - before]);
  node.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "i2l.advancedInputs",
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const defaults = new Map(advanced(node).map((widget) => [widget.name, widget.value]));
    fold(node, true);
    const configured = node.onConfigure;
    node.onConfigure = function (...args) {
      configured?.apply(this, args);
      if (advanced(this).some((widget) => widget.value !== defaults.get(widget.name))) fold(this, false);
    };
  },
  getNodeMenuItems(node) {
    if (node.comfyClass !== NODE) return [];
    const folded = advanced(node).some((widget) => widget.hidden);
    return [{ content: folded ? "Show advanced inputs" : "Hide advanced inputs", callback: () => fold(node, !folded) }];
  },
});
