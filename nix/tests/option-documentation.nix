# Builds the documentation of the module's options, which fails where one has no description.
{
  lib,
  nixosOptionsDoc,
  pkgs,
}:
let
  evaluated = lib.evalModules {
    modules = [
      ../module.nix
      {
        _module.check = false;
        _module.args = { inherit pkgs; };
      }
    ];
  };
in
(nixosOptionsDoc { options = { inherit (evaluated.options) services; }; }).optionsCommonMark
